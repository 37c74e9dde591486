"""Ray's cluster launcher on RunPod: a node provider, what guards its money, and what runs on its nodes.

The head of a cluster imports this package before anything else is installed there, so it needs the standard library
and Ray only, and nothing of `altgrad`. `provider` is what Ray talks to; `api` is what RunPod understands; `launcher`
and `candidates` find a GPU in a data centre; `spending` refuses what would cost too much, by what `record` keeps;
`registry` remembers tags; `checks` and `bootstrap` examine and complete the YAML file; `start_command`, `node`, `watch`
and `node_check` run on the nodes; `doctor` and `commands` are `altgrad cluster …`.
"""
