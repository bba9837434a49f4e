"""Tracing: what a model computes between tokens and logits, kept, explained and drawn.

| module | contents |
|---|---|
| ``trace`` | ``llm.trace``: the arrays of one text |
| ``patterns`` | the weights of a layer's attention heads |
| ``lens`` | what the residual stream would predict after each layer |
| ``attribution`` | what each layer, head and feed-forward network adds to the difference of two logits |
| ``names`` | ``llm.names()`` |
"""
