"""The command that a pod's container starts with: the image's own start script, beside it a timer over the watch.

`watch` ends pods that nobody needs, but runs only once a set-up command has started it. If the head or the laptop dies
before that, nothing in Ray would ever delete the pod. So the container itself asks every few seconds whether a watch
runs; when none has for `patience` seconds (none came, or it died) the pod deletes itself, with the key that RunPod puts
into its environment. A worker also deletes itself after `lifetime` seconds, whatever runs: RunPod's API has no time
limit, and this one holds when the autoscaler is stuck.

`args` replaces the image's CMD, which is `/start.sh` (sshd among others) in RunPod's images. It is one line without
single quotes or backslashes, so that any splitter of command lines reads it alike; it holds no secret, for the account
sees it.
"""

from __future__ import annotations

import shlex

REQUEST = (
    "import os, sys, urllib.request as u; url, key = map(os.environ.get, sys.argv[1:3]); "
    "u.urlopen(u.Request(url, method=sys.argv[3], headers=dict(Authorization=key)), timeout=30)"
)
SCRIPT = """
patience=@PATIENCE@ lifetime=@LIFETIME@;
(
last=$SECONDS;
while sleep @STEP@; do
    pid=$(cat "${HOME:-/root}/.altgrad/watch.pid" 2>/dev/null);
    if [ -n "$pid" ] && grep -q altgrad_cluster.watch "/proc/$pid/cmdline" 2>/dev/null; then last=$SECONDS; fi;
    if [ $((SECONDS - last)) -ge $patience ]; then why="no watch ran for $patience s";
    elif [ $lifetime -gt 0 ] && [ $SECONDS -ge $lifetime ]; then why="its time of $lifetime s is over";
    else continue; fi;
    echo "altgrad: $why: this pod deletes itself";
    export ALTGRAD_URL="@BASE@/v2/pods/$RUNPOD_POD_ID" ALTGRAD_KEY="Bearer $RUNPOD_API_KEY";
    python3 -c "@REQUEST@" ALTGRAD_URL ALTGRAD_KEY DELETE
    || curl -fsS -m 30 -X DELETE -H "Authorization: $ALTGRAD_KEY" "$ALTGRAD_URL"
    || runpodctl pod delete "$RUNPOD_POD_ID" || runpodctl remove pod "$RUNPOD_POD_ID";
    sleep @PAUSE@;
done
) &
if [ -x /start.sh ]; then exec /start.sh; fi; exec sleep infinity
"""


def start_command(base: str, patience: float, lifetime: float | None = None) -> str:
    """`args` of a pod that deletes itself through the API at `base`; times in seconds."""
    step = max(1, min(10, int(patience / 4)))
    words = {
        "@PATIENCE@": f"{int(patience)}",
        "@LIFETIME@": f"{int(lifetime or 0)}",
        "@STEP@": f"{step}",
        "@PAUSE@": f"{3 * step}",
        "@BASE@": base.rstrip("/"),
        "@REQUEST@": REQUEST,
    }
    script = " ".join(SCRIPT.split())
    for mark, word in words.items():
        script = script.replace(mark, word)
    return shlex.join(["bash", "-c", script])
