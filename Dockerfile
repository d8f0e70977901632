# The search of docs/search.md: index, query, serve, mcp. Steps: docs/api.md.
#
#     docker build --tag xclip-search .                             # computes on the CPU
#     docker build --tag xclip-search:gpu --build-arg JAX=cuda13 .  # NVIDIA GPUs, or cuda12
#
# For a cluster of Ray, see launch/README.md: --build-arg EXTRAS=search,ray --build-arg PACKAGES=wget
FROM python:3.12-slim

# Names of extras of setup.py, e.g. "search,mcp,ocr,asr", and cuda12, cuda13 or nothing.
ARG EXTRAS=search,mcp
ARG JAX=
# Debian packages, e.g. wget, with which KubeRay checks its containers.
ARG PACKAGES=

ENV PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN if [ -n "$PACKAGES" ]; then \
      apt-get update && apt-get install --yes --no-install-recommends $PACKAGES \
      && rm -rf /var/lib/apt/lists/*; \
    fi
WORKDIR /app
COPY constraints.txt pyproject.toml setup.py README.md LICENSE ./
COPY xclip_jax xclip_jax
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install ".[${EXTRAS}${JAX:+,${JAX}}]" --constraint constraints.txt

# A volume that Docker creates for one of these folders belongs to the same user.
RUN useradd --uid 1000 --user-group --create-home search \
    && install --directory --owner=search --group=search /index /added /videos /models
USER 1000:1000
WORKDIR /home/search
EXPOSE 7870

# Without the token the server refuses, but answers.
HEALTHCHECK --interval=30s --timeout=5s --start-period=180s CMD ["python", "-c", "\
import http.client, sys; \
connection = http.client.HTTPConnection('127.0.0.1', 7870, timeout=4); \
connection.request('GET', '/api/index'); \
sys.exit(connection.getresponse().status not in (200, 401))"]

ENTRYPOINT ["python", "-m", "xclip_jax.search"]
CMD ["serve", "--index=/index/videos", "--host=0.0.0.0"]
