"""RoPE: exact angles at long positions, every scaling rule, both layouts, and what a rotation must preserve."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ruvllm.kernels import apply_rope, apply_rope_tables, reference, rope_inv_freq, rope_tables

POSITIONS = np.array([0, 1, 2, 100, 4095, 8192, 131071, 1048575])


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_frequencies() -> None:
    np.testing.assert_allclose(rope_inv_freq(8, 10000.0), [1, 0.1, 0.01, 0.001], rtol=1e-15)
    assert rope_inv_freq(64).dtype == np.float64


def test_linear_scaling_divides_positions() -> None:
    cos, sin = rope_tables(POSITIONS * 4, 64, scaling="linear", factor=4.0)
    plain = rope_tables(POSITIONS, 64)
    np.testing.assert_array_equal((cos, sin), plain)


def test_ntk_scaling_keeps_the_fastest_pair_and_slows_the_slowest_by_the_factor() -> None:
    plain, scaled = rope_inv_freq(64, 10000.0), rope_inv_freq(64, 10000.0, "ntk", 8.0)
    assert scaled[0] == plain[0] == 1
    np.testing.assert_allclose(plain[-1] / scaled[-1], 8, rtol=1e-12)
    np.testing.assert_allclose(scaled, (10000.0 * 8 ** (64 / 62)) ** (-np.arange(0, 64, 2) / 64), rtol=1e-12)


def test_llama3_scaling() -> None:
    """The rule as Llama 3.1 states it, pair by pair."""
    factor, low, high, length = 8.0, 1.0, 4.0, 8192
    scaled = rope_inv_freq(128, 500000.0, "llama3", factor, low, high, length)
    kinds = set()
    for f, got in zip(rope_inv_freq(128, 500000.0), scaled, strict=True):
        wavelength = 2 * np.pi / f
        if wavelength < length / high:
            kinds.add("kept")
            expected = f
        elif wavelength > length / low:
            kinds.add("slowed")
            expected = f / factor
        else:
            kinds.add("between")
            smooth = (length / wavelength - low) / (high - low)
            expected = (1 - smooth) * f / factor + smooth * f
        np.testing.assert_allclose(got, expected, rtol=1e-12)
    assert kinds == {"kept", "slowed", "between"}


def test_llama3_scaling_equals_transformers() -> None:
    """Llama 3.1 8B's frequencies as transformers 5.23 computes them, in float32."""
    theirs = {
        0: 1.0, 1: 0.8146172165870667, 20: 0.016560440883040428, 28: 0.0032114461064338684,
        29: 0.0021665706299245358, 30: 0.0013718936825171113, 31: 0.0008567514596506953,
        32: 0.0005248460220173001, 33: 0.0003126936499029398, 34: 0.0001785077911335975,
        35: 9.556212171446532e-05, 36: 7.784655463183299e-05, 50: 4.411534519022098e-06, 63: 3.068925877869333e-07,
    }  # fmt: skip
    ours = rope_inv_freq(128, 500000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    np.testing.assert_allclose(ours[list(theirs)], list(theirs.values()), rtol=1e-6)


def test_factors_divide_pair_by_pair() -> None:
    factors = np.linspace(1, 8, 16)
    np.testing.assert_allclose(rope_inv_freq(32, scaling="factors", factors=factors), rope_inv_freq(32) / factors)


def test_angles_are_right_at_long_positions() -> None:
    """Extended precision is the oracle: a float32 angle would be off by 3e-3 at position 131071."""
    angles = POSITIONS[:, None].astype(np.longdouble) * rope_inv_freq(128, 500000.0)
    cos, sin = rope_tables(POSITIONS, 128, 500000.0)
    assert cos.dtype == sin.dtype == np.float32
    np.testing.assert_allclose(cos, np.cos(angles).astype(np.float64), rtol=0, atol=4e-8)
    np.testing.assert_allclose(sin, np.sin(angles).astype(np.float64), rtol=0, atol=4e-8)
    x = _normal(len(POSITIONS), 2, 128)
    expected = reference.apply_rope(x, POSITIONS, rope_inv_freq(128, 500000.0))
    np.testing.assert_allclose(apply_rope(x, POSITIONS, rope_inv_freq(128, 500000.0)), expected, atol=6e-7)


@pytest.mark.parametrize("interleaved", [False, True])
def test_known_rotation(interleaved: bool) -> None:
    """Pairs (1, 0) and (0, 1), in either layout, turned by 1 and by 0.01 radians."""
    c, s = np.cos([1, 0.01]), np.sin([1, 0.01])
    x = np.array([1, 0, 0, 1], np.float32).reshape(1, 1, 4)
    expected = [c[0], s[0], -s[1], c[1]] if interleaved else [c[0], -s[1], s[0], c[1]]
    np.testing.assert_allclose(apply_rope(x, [1], interleaved=interleaved).reshape(-1), expected, atol=1e-7)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [2, 4, 30, 32, 34, 62, 64, 66, 80, 96, 128, 130])
def test_tables_and_angles_give_the_same(dim: int, interleaved: bool) -> None:
    x = _normal(8, 3, dim)
    inv_freq = rope_inv_freq(dim)
    cos, sin = rope_tables(POSITIONS, dim)
    for inverse in (False, True):
        y = apply_rope_tables(x, cos, sin, interleaved, inverse)
        expected = reference.apply_rope_tables(x, cos, sin, interleaved, inverse)
        np.testing.assert_allclose(y, expected, atol=5e-7)
        np.testing.assert_allclose(apply_rope(x, POSITIONS, inv_freq, interleaved, inverse), y, atol=5e-7)


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_rotation_preserves_lengths_and_is_undone_by_its_inverse(interleaved: bool) -> None:
    x = _normal(8, 5, 96)
    y = apply_rope(x, POSITIONS, interleaved=interleaved)
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6)
    np.testing.assert_allclose(apply_rope(y, POSITIONS, interleaved=interleaved, inverse=True), x, atol=1e-6)


def test_layouts_are_permutations_of_each_other() -> None:
    x = _normal(8, 3, 64)
    to_interleaved = np.arange(64).reshape(2, 32).T.reshape(-1)  # i, i + 32 next to each other
    y = apply_rope(x, POSITIONS)
    turned = apply_rope(x[..., to_interleaved], POSITIONS, interleaved=True)
    np.testing.assert_array_equal(turned, y[..., to_interleaved])


@given(st.integers(0, 100000), st.integers(0, 100000), st.integers(0, 100000))
def test_scores_depend_on_the_distance_alone(a: int, b: int, shift: int) -> None:
    q, k = _normal(1, 1, 64), _normal(1, 1, 64, seed=1)

    def score(i: int, j: int) -> float:
        return float(np.vdot(apply_rope(q, [i]), apply_rope(k, [j])))

    np.testing.assert_allclose(score(a, b), score(a + shift, b + shift), atol=1e-5)


def test_negative_positions_turn_back() -> None:
    x = _normal(8, 1, 64)
    np.testing.assert_allclose(apply_rope(x, -POSITIONS), apply_rope(x, POSITIONS, inverse=True), atol=2e-7)


@pytest.mark.parametrize("interleaved", [False, True])
def test_in_place_and_in_batches(interleaved: bool) -> None:
    x = _normal(2, 3, 8, 5, 66)  # two leading dimensions that share positions
    cos, sin = rope_tables(POSITIONS, 66)
    one_by_one = np.stack([apply_rope(s, POSITIONS, interleaved=interleaved) for s in x.reshape(6, 8, 5, 66)])
    together = apply_rope(x, POSITIONS, interleaved=interleaved)
    np.testing.assert_allclose(together.reshape(6, 8, 5, 66), one_by_one, atol=5e-7)
    y = apply_rope_tables(x, cos, sin, interleaved)
    changed = x.copy()
    assert apply_rope_tables(changed, cos, sin, interleaved, out=changed) is changed
    np.testing.assert_array_equal(changed, y)
    changed = x[0, 0].copy()
    apply_rope(changed, POSITIONS, interleaved=interleaved, out=changed)
    np.testing.assert_allclose(changed, y[0, 0], atol=5e-7)


def test_long_sequences_take_threads_and_agree() -> None:
    x = _normal(300, 4, 64)
    np.testing.assert_allclose(
        apply_rope(x, np.arange(300)), reference.apply_rope(x, np.arange(300), rope_inv_freq(64)), atol=6e-7
    )


def test_no_tokens() -> None:
    assert apply_rope(np.empty((0, 2, 8), np.float32), np.empty(0, np.int64)).shape == (0, 2, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head_dim": 7}, "head_dim: expected an even number"),
        ({"head_dim": 0}, "head_dim: expected an even number"),
        ({"theta": 0.0}, "theta: expected a finite number > 0"),
        ({"theta": float("nan")}, "theta: expected a finite number > 0"),
        ({"scaling": "linear", "factor": -1.0}, "factor: expected a finite number > 0"),
        ({"scaling": "dynamic"}, "scaling: expected None, 'linear', 'ntk', 'llama3', 'factors', 'yarn' or "),
        ({"scaling": "llama3", "low_freq_factor": 4.0}, "high_freq_factor: expected more than low_freq_factor 4.0"),
        ({"scaling": "factors", "factors": [1.0, 2.0]}, "factors: expected 4 positive numbers"),
        ({"scaling": "factors", "factors": [1.0, 2.0, 0.0, 1.0]}, "factors: expected 4 positive numbers"),
        ({"scaling": "factors"}, "factors: expected 4 positive numbers"),
    ],
)
def test_frequencies_that_cannot_be(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        rope_inv_freq(**{"head_dim": 8, **arguments})


def test_shapes_that_do_not_fit() -> None:
    x = _normal(3, 2, 8)
    cos, sin = rope_tables(np.arange(3), 8)
    with pytest.raises(ValueError, match=r"cos: expected shape \(3, .*\), found \(2, 4\)"):
        apply_rope_tables(x, cos[:2], sin)
    with pytest.raises(ValueError, match=r"sin: expected shape \(3, 4\)"):
        apply_rope_tables(x, cos, sin[:, :3])
    with pytest.raises(ValueError, match="x: expected an even last axis"):
        apply_rope(_normal(3, 2, 7), np.arange(3))
    with pytest.raises(ValueError, match="x: expected at least 3 dimensions"):
        apply_rope(_normal(3, 8), np.arange(3))
    with pytest.raises(ValueError, match="positions: expected 3, one per token, found 4"):
        apply_rope(x, np.arange(4))
    with pytest.raises(TypeError, match="positions: expected integers, found float64"):
        apply_rope(x, np.arange(3.0))
    with pytest.raises(ValueError, match=r"inv_freq: expected at most 4, for heads of 8, found shape \(8,\)"):
        apply_rope(x, np.arange(3), np.ones(8))


def test_tables_into_arrays_of_the_caller() -> None:
    out = np.empty((3, 8), np.float32), np.empty((3, 8), np.float32)
    cos, sin = rope_tables(np.arange(3), 16, out=out)
    assert cos is out[0] and sin is out[1]
    for got, expected in zip(out, rope_tables(np.arange(3), 16), strict=True):
        np.testing.assert_array_equal(got, expected)
    with pytest.raises(TypeError, match="^out: expected two arrays"):
        rope_tables(np.arange(3), 16, out=out[0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^out: expected shape"):
        rope_tables(np.arange(4), 16, out=out)


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_head_that_is_rotated_in_part(interleaved: bool) -> None:
    """Elements from R on stay as they are; the others are rotated as a head of R."""
    x = np.random.default_rng(0).standard_normal((5, 3, 22), np.float32)
    cos, sin = rope_tables(np.arange(5), 14)
    y = apply_rope_tables(x, cos, sin, interleaved)
    np.testing.assert_array_equal(y[..., 14:], x[..., 14:])
    np.testing.assert_array_equal(y[..., :14], apply_rope_tables(x[..., :14].copy(), cos, sin, interleaved))
    by_angle = apply_rope(x, np.arange(5), rope_inv_freq(14), interleaved)
    np.testing.assert_array_equal(by_angle[..., 14:], x[..., 14:])
    np.testing.assert_allclose(by_angle, y, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="^cos: expected at most 11 pairs for heads of 22, found 12$"):
        apply_rope_tables(x, *rope_tables(np.arange(5), 24))


def test_yarn_keeps_fast_pairs_and_slows_slow_ones() -> None:
    plain, scaled = rope_inv_freq(64), rope_inv_freq(64, 1e4, "yarn", 4.0, 1.0, 32.0, 256)
    turns = 256 * plain / (2 * np.pi)
    np.testing.assert_array_equal(scaled[turns > 40], plain[turns > 40])
    np.testing.assert_allclose(scaled[turns < 0.7], plain[turns < 0.7] / 4, rtol=1e-12)
    assert np.all(np.diff(plain / scaled) >= -1e-12)
    assert np.any(scaled != rope_inv_freq(64, 1e4, "yarn_unrounded", 4.0, 1.0, 32.0, 256))
