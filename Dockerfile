# For machines without a GPU: all that `make install` brings, with torch's CPU build.
#     docker build -t unlearning .
#     docker run --rm -v "$PWD/models:/unlearning/models" -v "$PWD/reports:/unlearning/reports" unlearning make demo
FROM python:3.11.14-slim-bookworm

# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends make && rm -rf /var/lib/apt/lists/*

WORKDIR /unlearning
# of two builds of the pinned torch, pip takes 2.13.0+cpu, which counts as the newer one
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu PIP_NO_CACHE_DIR=1 PATH="/unlearning/.venv/bin:$PATH"
COPY Makefile requirements.txt requirements-embedded.txt requirements-dev.txt ./
RUN make install
COPY . .
CMD ["make", "demo"]
