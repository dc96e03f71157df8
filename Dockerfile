# The image of every node: head, workers and jobs. CPU by default; for GPUs build with
#   --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128
FROM python:3.11-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 RAY_USAGE_STATS_ENABLED=0 GOMP_SPINCOUNT=1000
# Serve's HTTP proxy answers for an ingress that is lost, and closes connections that say nothing (ray_app/serve/proxy.py)
ENV RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=ray_app.serve.proxy.guard

RUN apt-get update && apt-get install -y --no-install-recommends procps wget && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 ray
WORKDIR /opt/dreamfleet
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY training ./training
COPY serving ./serving
COPY fleet ./fleet
COPY ray_app ./ray_app
RUN pip install --extra-index-url "$TORCH_INDEX" -c constraints.txt torch==2.13.0 .
USER ray
WORKDIR /home/ray
