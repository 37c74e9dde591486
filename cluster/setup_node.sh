#!/usr/bin/env bash
# Makes a fresh pod able to run Ray and AltGrad: setup_node.sh head|worker|machine RAY_VERSION. Harmless to run again.
# An image that has everything already is left as it is.
set -euo pipefail
kind=$1 ray_version=$2
touch ~/.bashrc
grep -qxF '. ~/altgrad/cluster/env.sh' ~/.bashrc || echo '. ~/altgrad/cluster/env.sh' >> ~/.bashrc
. ~/altgrad/cluster/env.sh
if ! python3 -m altgrad_cluster.node_check "$kind" "$ray_version" >/dev/null 2>&1; then
    python3 -m pip install --quiet --disable-pip-version-check -e ~/altgrad "ray[default,tune,train]==$ray_version"
fi
python3 -m altgrad_cluster.node_check "$kind" "$ray_version"
