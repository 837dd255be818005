# The image of compose.yaml: everything installed, no code. The checkout is mounted at /checkout.
FROM python:3.11-slim
RUN apt-get update && apt-get install --yes --no-install-recommends git && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY taskvec taskvec
COPY tasks tasks
COPY flows flows
RUN pip install --no-cache-dir -c constraints.txt '.[demo,postgres]' \
    && git config --system --add safe.directory /checkout
WORKDIR /checkout
