#!/usr/bin/env bash
# Makes a fresh pod able to run Ray and AltGrad: setup_node.sh head|worker|machine RAY_VERSION. Harmless to run again.
# An image that has everything already is left as it is. What it lacks goes into a virtual environment that sees the
# image's packages, torch above all: Debian and Ubuntu let pip install nowhere else.
set -euo pipefail
kind=$1 ray_version=$2 venv=$HOME/altgrad-venv
touch ~/.bashrc
# As the last line: RunPod's start script appends one that sets PATH.
sed -i '\#altgrad/cluster/env.sh#d' ~/.bashrc
echo '. ~/altgrad/cluster/env.sh' >> ~/.bashrc
. ~/altgrad/cluster/env.sh
if ! python3 -m altgrad_cluster.node_check software "$ray_version" >/dev/null 2>&1; then
    if ! [ -x "$venv/bin/python3" ]; then
        # An image's python3 may live in a virtual environment, whose packages --system-site-packages does not mean.
        packages=$(python3 -c 'import site, sys; print("\n".join(site.getsitepackages() * (sys.prefix != sys.base_prefix)))')
        python3 -m venv --system-site-packages --without-pip "$venv"
        echo "$packages" > "$("$venv/bin/python3" -c 'import site; print(site.getsitepackages()[0])')/image.pth"
    fi
    . ~/altgrad/cluster/env.sh
    # The image's pip serves, where it has one.
    python3 -m pip --version >/dev/null 2>&1 || { apt-get update -qq && apt-get install -y -qq python3-pip >/dev/null; }
    # The code itself is on PYTHONPATH.
    mapfile -t wanted < <(python3 -m altgrad_cluster.node_check requirements "$ray_version")
    python3 -m pip install --quiet --disable-pip-version-check "${wanted[@]}"
    # The image's own `ray` would start Ray with the image's python3.
    for command in ray=ray.scripts.scripts altgrad=altgrad; do
        [ -e "$venv/bin/${command%%=*}" ] ||
            printf '#!/bin/sh\nexec "%s/bin/python3" -m %s "$@"\n' "$venv" "${command#*=}" > "$venv/bin/${command%%=*}"
        chmod 755 "$venv/bin/${command%%=*}"
    done
fi
python3 -m altgrad_cluster.node_check "$kind" "$ray_version"
