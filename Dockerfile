# roundwise on CPUs, with its C++ extension, tasks and the server.
#
#     docker build -t roundwise .
#     docker run --rm -v "$PWD:/work" roundwise quantize my-model out --calibration notes.txt
#     docker run --rm -v "$PWD:/work" -p 8000:8000 roundwise serve out --host 0.0.0.0 --api-key KEY
#
# Where the package index has CUDA builds of torch, a smaller image needs one with CPU builds:
# --build-arg PIP_EXTRA_INDEX_URL=…
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source

FROM python:3.12-slim
ARG PIP_EXTRA_INDEX_URL
COPY --from=build /wheels /wheels
RUN wheel=$(ls /wheels/*.whl) \
    && pip install --no-cache-dir "roundwise[eval,serve] @ file://$wheel" \
    && roundwise doctor
RUN useradd --create-home user
USER user
WORKDIR /work
ENTRYPOINT ["roundwise"]
