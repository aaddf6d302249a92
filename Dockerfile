# By digest, so that this commit starts from the same base next year; tools/lock.py renews it.
ARG BASE_IMAGE=python:3.11-slim@sha256:db3ff2e1800a8581e2c48a27c3995339d47bdf046da21c7627accd3d51053a93
# hadolint ignore=DL3006
FROM ${BASE_IMAGE}

LABEL org.opencontainers.image.title="aura_engine" \
      org.opencontainers.image.description="A literate text-to-image engine" \
      org.opencontainers.image.licenses="Apache-2.0"

RUN useradd -m -u 1000 user
WORKDIR /home/user/app

# Which wheels of torch: cpu, cu126 and the like (names of its own indexes), an index's address, or pypi for pip's usual one.
# A Space variable of this name reaches the build. A CUDA torch is several GB more, and runs on older drivers the lower its number is.
# Wheels that have a lock (tools/lock.py) are installed by hash: torch from its own index, which may have other files under the names
# of what it needs, and those from pip's usual one. Others are installed by version.
ARG TORCH_INDEX_URL=cpu
COPY locks ./locks
# hadolint ignore=DL3013
RUN case "$TORCH_INDEX_URL" in \
      ""|pypi) name=pypi; index= ;; \
      *://*) name=; index="$TORCH_INDEX_URL" ;; \
      *) name="$TORCH_INDEX_URL"; index="https://download.pytorch.org/whl/$TORCH_INDEX_URL" ;; \
    esac; \
    if [ "$(uname -m)" != x86_64 ] || [ ! -f "locks/torch-$name.lock" ]; then \
      PIP_INDEX_URL="$index" pip install --no-cache-dir torch==2.13.0; \
    else \
      PIP_INDEX_URL="$index" pip install --no-cache-dir --no-deps --require-hashes -r "locks/torch-$name.lock" && \
      if [ -f "locks/cuda-$name.lock" ]; then \
        pip install --no-cache-dir --no-deps --require-hashes -r "locks/cuda-$name.lock"; \
      fi; \
    fi

# Everything else by version and hash, so that this commit gives the same image in a year.
COPY requirements.lock ./
RUN pip install --no-cache-dir --no-deps --require-hashes -r requirements.lock

# TORCH_COMPILE=1 needs a C compiler on a GPU; without CUDA it is not worth its 200 MB.
# hadolint ignore=DL3008
RUN if python -c "import sys, torch; sys.exit(torch.version.cuda is None)"; then \
      apt-get update && apt-get install -y --no-install-recommends gcc g++ libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi

# More packages, separated by spaces. openvino, for SD_BACKEND=openvino, has a lock and is installed by hash, others are not.
ARG EXTRA_PACKAGES=
# hadolint ignore=DL3013,SC2086
RUN set -e; rest=; \
    for name in $EXTRA_PACKAGES; do \
      if [ -f "locks/$name.lock" ]; \
        then pip install --no-cache-dir --no-deps --require-hashes -r "locks/$name.lock"; \
        else rest="$rest $name"; \
      fi; \
    done; \
    if [ -n "$rest" ]; then pip install --no-cache-dir $rest; fi

# The app runs as uid 1000 and may write only under its home. HOST: a container's port is what decides who may call.
# AURA_MODELS: models may be mounted there, as owner/name.
USER 1000
ENV HOME=/home/user \
    HOST=0.0.0.0 \
    PORT=7860 \
    PYTHONUNBUFFERED=1 \
    AURA_MODELS=/models \
    XDG_CACHE_HOME=/home/user/.cache \
    HF_HOME=/home/user/.cache/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/home/user/.cache/inductor \
    TRITON_CACHE_DIR=/home/user/.cache/triton \
    MPLCONFIGDIR=/home/user/.cache/matplotlib
# There already, so that a volume mounted on it belongs to uid 1000.
RUN mkdir "$XDG_CACHE_HOME"

COPY --chown=1000:1000 app.py requirements.txt ./
COPY --chown=1000:1000 aura_engine ./aura_engine

# Names the code in /health; the deployer writes it.
ARG AURA_BUILD_ID=
ENV AURA_BUILD_ID=$AURA_BUILD_ID
LABEL org.opencontainers.image.revision=$AURA_BUILD_ID

EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ['PORT']}/health\", timeout=5)"]
CMD ["python", "app.py"]
