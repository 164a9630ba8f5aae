#!/bin/sh
# Make the secrets compose.yaml mounts, once: existing ones are left as they are. Containers of different users read
# them, so the files are world-readable and the folder around them is what keeps other people out.
set -eu
cd "$(dirname "$0")"
mkdir -p secrets
chmod 700 secrets
for name in ray-token postgres-password mlflow-admin-password mlflow-flask-secret-key; do
  if [ ! -s "secrets/$name" ]; then
    openssl rand -hex 32 | tr -d '\n' > "secrets/$name"
    chmod 644 "secrets/$name"
  fi
done
