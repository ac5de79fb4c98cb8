# Image of this project. From the repository's root:
#
#     docker build -t hedgehog-llama .
#     docker run --rm --gpus all -v "$PWD/runs:/srv/runs" hedgehog-llama run /opt/hedgehog/configs/tiny.yaml
#
# On clusters: slurm/README.md, "Containers" (the same as an Apptainer image: slurm/hedgehog.def). This base is small and has no
# nvcc, without which the CUDA kernels are not built; one that has it:
#
#     docker build -t hedgehog-llama --build-arg BASE_IMAGE=nvidia/cuda:13.0.0-devel-ubuntu24.04 .
ARG BASE_IMAGE=python:3.12-slim
FROM ${BASE_IMAGE}

# a compiler for what Triton builds at its first use; Python where the base has none
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ $(command -v pip > /dev/null || echo python3-dev python3-venv) \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

WORKDIR /opt/hedgehog
COPY pyproject.toml constraints.txt README.md LICENSE ./
# torch first and pinned: with it there, no other package pulls a second build; a layer of its own, for it seldom changes
RUN pip install --no-cache-dir --constraint constraints.txt torch
COPY kernels kernels
COPY pipeline pipeline
COPY stages stages
COPY slurm slurm
COPY configs configs
RUN pip install --no-cache-dir --constraint constraints.txt '.[eval]'

ENV PYTHONUNBUFFERED=1
WORKDIR /srv
ENTRYPOINT ["hedgehog"]
CMD ["--help"]
