# docker build -t ruvllm . && docker run --rm -it -v ruvllm:/cache ruvllm chat smollm2-135m
# Models and compiled kernels are kept in the volume: kernels are compiled where they run, for its processor.
FROM python:3.13-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY ruvllm ruvllm
RUN python -m pip install --no-cache-dir build && python -m build --wheel

FROM python:3.13-slim
# Numba's OpenMP threads need libgomp.
RUN apt-get update && apt-get install --yes --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
COPY --from=build /src/dist/*.whl /tmp/
RUN python -m pip install --no-cache-dir /tmp/*.whl && rm /tmp/*.whl \
    && useradd --create-home --uid 1000 ruvllm && mkdir -m 700 /cache && chown ruvllm /cache
USER ruvllm
ENV RUVLLM_CACHE=/cache
VOLUME /cache
ENTRYPOINT ["ruvllm"]
CMD ["--help"]
