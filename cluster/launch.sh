#!/usr/bin/env bash
# Starts a Lockstep cluster: a coordinator and a gateway here, and nodes here or over ssh.
#
#   cluster/launch.sh --local N  --model NAME=PATH [options]   N node processes on this machine
#   cluster/launch.sh --hosts FILE --model NAME=PATH [options] one node on each host of FILE
#
#   --model NAME=PATH   a model to serve, at this path on every node; repeatable
#   --trainers N        ranks on each node (1)
#   --samplers N        replicas on each node (1)
#   --threads N         cores of each node (all; with --local its share)
#   --data-dir DIR      journal, blobs and certificates of the coordinator (./lockstep-data)
#   --http HOST:PORT    where HTTP is served (127.0.0.1:8000); more than loopback needs --insecure
#   --address HOST      how nodes reach this machine (127.0.0.1 with --local, else its first address)
#   --port P            the coordinator's port; nodes join at the next one (7700)
#   --lockstep PATH     the binary, here and on the hosts (lockstep on PATH)
#   --remote-dir DIR    a node's own directory on its host (.lockstep-node)
#
# FILE has a host (or user@host) a line; `#` begins a comment. Ctrl-C drains and stops everything.
set -euo pipefail

usage() { sed -n '2,21p' "$0" | cut -c3-; }
fail() {
    echo "launch.sh: $1" >&2
    exit 2
}

local_nodes="" hosts_file="" address="" port=7700 http=127.0.0.1:8000 insecure=()
data_dir=./lockstep-data lockstep=lockstep remote_dir=.lockstep-node
models=() node_flags=() threads=""
while [ $# -gt 0 ]; do
    case $1 in
        --local) local_nodes=${2:?"$1 needs a number"} ;;
        --hosts) hosts_file=${2:?"$1 needs a file"} ;;
        --model) models+=(--model "${2:?"$1 needs NAME=PATH"}") ;;
        --trainers | --samplers) node_flags+=("$1" "${2:?"$1 needs a number"}") ;;
        --threads) threads=${2:?"$1 needs a number"} ;;
        --data-dir) data_dir=${2:?"$1 needs a directory"} ;;
        --http) http=${2:?"$1 needs HOST:PORT"} ;;
        --address) address=${2:?"$1 needs a host"} ;;
        --port) port=${2:?"$1 needs a port"} ;;
        --lockstep) lockstep=${2:?"$1 needs a path"} ;;
        --remote-dir) remote_dir=${2:?"$1 needs a directory"} ;;
        --insecure)
            insecure=(--insecure)
            shift
            continue
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        *) fail "unknown option $1 (--help lists them)" ;;
    esac
    shift 2
done
[ -n "$local_nodes" ] || [ -n "$hosts_file" ] || fail "give --local N or --hosts FILE (--help says more)"
[ -z "$local_nodes" ] || [ -z "$hosts_file" ] || fail "--local and --hosts exclude each other"
[ ${#models[@]} -gt 0 ] || fail "give --model NAME=PATH"
command -v "$lockstep" >/dev/null || fail "there is no $lockstep; build it or give --lockstep PATH"

hosts=()
if [ -n "$hosts_file" ]; then
    [ -r "$hosts_file" ] || fail "can't read $hosts_file"
    while read -r host _; do
        case $host in '' | '#'*) ;; *) hosts+=("$host") ;; esac
    done <"$hosts_file"
    [ ${#hosts[@]} -gt 0 ] || fail "$hosts_file names no host"
    [ -n "$address" ] || address=$(hostname -I | cut -d' ' -f1)
    listen=0.0.0.0
    nodes=${#hosts[@]}
else
    case $local_nodes in '' | *[!0-9]* | 0) fail "--local $local_nodes is no number of nodes" ;; esac
    address=${address:-127.0.0.1}
    listen=$address
    nodes=$local_nodes
    if [ -z "$threads" ]; then
        threads=$(($(nproc) / nodes))
        [ "$threads" -gt 0 ] || threads=1
    fi
fi
[ -z "$threads" ] || node_flags+=(--threads "$threads")

# keep NAME COMMAND…: runs a part again when it dies, but not when it says that this is no use (78) or is
# not there (126, 127). Its standard input is the token, once there is one.
token=""
keep() {
    local name=$1 child="" status pause=1
    shift
    trap '[ -z "$child" ] || kill -TERM "$child" 2>/dev/null; wait; exit 0' TERM
    while true; do
        status=0
        "$@" <<<"$token" &
        child=$!
        wait "$child" || status=$?
        case $status in 0 | 78 | 126 | 127) return "$status" ;; esac
        echo "launch.sh: $name ended with status $status; starting it again in $pause s" >&2
        sleep "$pause"
        pause=$((pause < 30 ? pause * 2 : 30))
    done
}

# Stopping: the coordinator drains, takes snapshots and tells the nodes to end.
coordinator="" gateway="" keepers=()
stop() {
    trap - INT TERM EXIT
    [ -z "$gateway" ] || kill -TERM "$gateway" 2>/dev/null || true
    # The nodes' keepers first, so that no node is started again.
    for keeper in "${keepers[@]}"; do kill -TERM "$keeper" 2>/dev/null || true; done
    [ -z "$coordinator" ] || kill -TERM "$coordinator" 2>/dev/null || true
    wait
}
trap 'stop; exit 130' INT TERM
trap stop EXIT

mkdir -p "$data_dir"
# The address that an earlier life left is no answer to whether this one is up.
begun=$(mktemp)
keep "the coordinator" "$lockstep" coordinator --listen "$listen:$port" --join-listen "$listen:$((port + 1))" \
    --data-dir "$data_dir" >/dev/null &
coordinator=$!
until [ "$data_dir/endpoint" -nt "$begun" ]; do
    kill -0 "$coordinator" 2>/dev/null || fail "the coordinator did not start; it said why above"
    sleep 0.1
done
rm -f "$begun"

# A use for each node: once it has its certificate it needs none. It goes over standard input, as
# arguments and environments are everybody's to read.
token=$("$lockstep" token create --uses "$nodes" --valid 1h --data-dir "$data_dir")

# What runs on a node: reads the token from standard input.
node='IFS= read -r LOCKSTEP_TOKEN; export LOCKSTEP_TOKEN; exec "$@"'
for ((index = 0; index < nodes; index++)); do
    flags=(node --name "node-$index" --coordinator "$address:$port" "${node_flags[@]}" "${models[@]}")
    if [ -n "$hosts_file" ]; then
        host=${hosts[$index]}
        # ssh joins its arguments with spaces and the far shell splits them: quote them for it.
        far=$(printf '%q ' sh -c "$node" sh "$lockstep" "${flags[@]}" --data-dir "$remote_dir")
        keep "node-$index on $host" ssh -o BatchMode=yes "$host" "$far" &
    else
        keep "node-$index" sh -c "$node" sh "$lockstep" "${flags[@]}" --data-dir "$data_dir/node-$index" \
            --cache-dir "$data_dir/cache" &
    fi
    keepers+=($!)
done

keep "the gateway" "$lockstep" gateway --http "$http" "${insecure[@]}" --data-dir "$data_dir" &
gateway=$!
wait "$gateway"
