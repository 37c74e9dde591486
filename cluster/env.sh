# What every shell and Ray process on a node of the cluster needs; `setup_node.sh` lets ~/.bashrc read it.
case ":${PYTHONPATH:-}:" in
    *":$HOME/altgrad/cluster:"*) ;;
    *) export PYTHONPATH="$HOME/altgrad:$HOME/altgrad/cluster${PYTHONPATH:+:$PYTHONPATH}" ;;
esac
# There only where the image lacks something.
if [ -x "$HOME/altgrad-venv/bin/python3" ]; then
    case "$PATH" in
        "$HOME/altgrad-venv/bin:"*) ;;
        *) export PATH="$HOME/altgrad-venv/bin:$PATH" ;;
    esac
fi
export RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED=0
# One pod per request, so that Ray knows which of several failed.
export AUTOSCALER_MAX_LAUNCH_BATCH=1
# Compiled files beside the shipped code would look like a change of it; where others can write, they could plant theirs.
(umask 077 && mkdir -p "$HOME/.cache/altgrad/python" "$HOME/.cache/altgrad/numba") && chmod 700 "$HOME/.cache/altgrad"
export PYTHONPYCACHEPREFIX="$HOME/.cache/altgrad/python"
export NUMBA_CACHE_DIR="$HOME/.cache/altgrad/numba"
# WANDB_API_KEY, HF_TOKEN and the like: lines NAME=value, checked where `ray up` ran.
if [ -r "$HOME/.altgrad/secrets.env" ]; then
    set -a
    . "$HOME/.altgrad/secrets.env"
    set +a
fi
