# medsd with the versions of constraints.txt. Two builds:
#   docker build -t medsd .                                            CUDA (runs on the CPU, too)
#   docker build -t medsd:cpu --build-arg TORCH_INDEX=INDEX_OF_CPU_BUILDS .
# Run:  docker run --rm --shm-size 2g --gpus all -v "$PWD:/data" medsd heatmap /data/slide.svs ...
FROM python:3.11-slim-bookworm

# libGL for OpenCV, OpenJPEG for plain JPEG 2000.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgl1 libglib2.0-0 libopenjp2-7 \
    && rm -rf /var/lib/apt/lists/*

# PyTorch's index of CPU builds; empty for the CUDA build.
ARG TORCH_INDEX=""
WORKDIR /opt/medsd
COPY pyproject.toml setup.py MANIFEST.in constraints.txt README.md LICENSE ./
COPY medsd medsd
COPY bundles bundles
COPY configs configs
# hadolint ignore=DL3013
RUN if [ -n "$TORCH_INDEX" ]; then \
        PIP_INDEX_URL="$TORCH_INDEX" pip install --no-cache-dir -c constraints.txt torch torchvision; \
    fi \
    && pip install --no-cache-dir -c constraints.txt . \
    && useradd --uid 1000 --create-home medsd \
    && medsd doctor /tmp

USER 1000
WORKDIR /data
ENTRYPOINT ["medsd"]
CMD ["--help"]
