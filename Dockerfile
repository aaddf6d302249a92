FROM python:3.11-slim

RUN useradd -m -u 1000 user
WORKDIR /home/user/app

# A Space variable of this name reaches the build: CPU wheels unless it says otherwise (a CUDA torch is several GB more).
# Empty, or "pypi" (a Space has no empty variables), means pip's usual index.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN PIP_INDEX_URL="${TORCH_INDEX_URL#pypi}" pip install --no-cache-dir torch==2.13.0

COPY requirements.txt ./
# More packages, such as openvino for SD_BACKEND=openvino.
ARG EXTRA_PACKAGES=
RUN pip install --no-cache-dir -r requirements.txt $EXTRA_PACKAGES

# The app runs as uid 1000 and may write only under its home.
USER 1000
ENV HOME=/home/user \
    HOST=0.0.0.0 \
    PORT=7860 \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/home/user/.cache \
    HF_HOME=/home/user/.cache/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/home/user/.cache/inductor \
    TRITON_CACHE_DIR=/home/user/.cache/triton \
    MPLCONFIGDIR=/home/user/.cache/matplotlib
# There already, so that a volume mounted on it belongs to uid 1000.
RUN mkdir "$XDG_CACHE_HOME"

COPY --chown=1000:1000 app.py ./
COPY --chown=1000:1000 aura_engine ./aura_engine

# Names the code in /health; the deployer writes it.
ARG AURA_BUILD_ID=
ENV AURA_BUILD_ID=$AURA_BUILD_ID

EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ['PORT']}/health\", timeout=5)"]
CMD ["python", "app.py"]
