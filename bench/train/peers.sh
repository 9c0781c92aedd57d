#!/usr/bin/env bash
# Installs the peers that can't share our environment, each into .bench-peers/<peer>, and measures
# fasttrain against them. Options are passed on to run.py. `INSTALL_ONLY=1` stops before measuring;
# `PEERS="trl"` takes some of them.
set -euo pipefail
cd "$(dirname "$0")/../.."

here=bench/train
peers_dir=.bench-peers
python=${PYTHON:-python3}
torch=$(grep -E '^torch==' constraints.txt)

# One constraint for all: our torch. TRL goes by our whole tested set; ArcticTraining needs
# transformers 4, which the set excludes.
mkdir -p "$peers_dir"
echo "$torch" > "$peers_dir/torch.txt"

install() {  # install <peer> <constraints> <requirement>...
    local venv=$peers_dir/$1 constraints=$2
    shift 2
    if [[ "$(cat "$venv/.installed" 2>/dev/null)" == "$torch $*" ]]; then return; fi
    echo "installing $* into $venv"
    "$python" -m venv "$venv"
    export PIP_CONSTRAINT=$PWD/$constraints PIP_BUILD_CONSTRAINT=$PWD/$constraints
    # DeepSpeed's build looks for the torch that is there, and for a packaging tool beside it.
    "$venv/bin/pip" install --quiet "setuptools>=77" wheel ninja packaging "$torch"
    DS_BUILD_OPS=0 "$venv/bin/pip" install --quiet "$@"
    echo "$torch $*" > "$venv/.installed"
}

for peer in ${PEERS:-trl arctic}; do
    case $peer in
        trl) install trl constraints.txt "trl==1.16.0" ;;
        arctic) install arctic "$peers_dir/torch.txt" "arctic-training==0.8.0" ;;
        *) echo "no peer '$peer': there are trl and arctic" >&2; exit 2 ;;
    esac
done

[[ -n "${INSTALL_ONLY:-}" ]] || .venv/bin/python "$here/run.py" --peers "$@"
