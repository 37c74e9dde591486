# What every shell and Ray process on a node of the cluster needs; `setup_node.sh` lets ~/.bashrc read it.
case ":${PYTHONPATH:-}:" in
    *":$HOME/altgrad/cluster:"*) ;;
    *) export PYTHONPATH="$HOME/altgrad:$HOME/altgrad/cluster${PYTHONPATH:+:$PYTHONPATH}" ;;
esac
export RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED=0
# One pod per request, so that Ray knows which of several failed.
export AUTOSCALER_MAX_LAUNCH_BATCH=1
# Compiled files beside the shipped code would look like a change of it.
export PYTHONPYCACHEPREFIX=/tmp/altgrad-pycache
export NUMBA_CACHE_DIR=/tmp/altgrad-numba
