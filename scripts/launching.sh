# Sourced by the launch scripts: their common arguments, the plan that is agreed to before money is spent, --dry-run.

fail() {
  echo "error: $*" >&2
  exit 2
}

# read_arguments [--dry-run] [--yes] NAME TOPOLOGY CONFIG WORKDIR [flags of train.py]
# sets dry_run, name, topology, slices, chip, shape, chips (of a slice), config, workdir and train, the command.
read_arguments() {
  dry_run='' agreed=''
  while [[ ${1:-} == --* ]]; do
    case $1 in
      --dry-run) dry_run=1 ;;
      --yes) agreed=1 ;;
      *) fail "there is no flag $1 before the name; --dry-run prints what would be run, --yes agrees to what it costs." ;;
    esac
    shift
  done
  [ $# -ge 4 ] || fail "give a name, chips, a config and a folder: bash $0 [--dry-run] [--yes] $usage [flags of train.py]"
  name=$1 topology=$2 config=$3 workdir=$4 flags=("${@:5}")
  [[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "the name '$name' must be of small letters, digits and '-', from a letter on."
  [[ $topology =~ ^(([0-9]+)x)?([a-z][a-z0-9]*):([0-9]+(x[0-9]+)*)$ ]] || fail "'$topology' is no topology; write chip:shape, as in v5e:4x4, 2xv5e:4x4 or h100:8x8."
  slices=${BASH_REMATCH[2]:-1} chip=${BASH_REMATCH[3]} shape=${BASH_REMATCH[4]}
  chips=$((${shape//x/*}))
  [ -f "$config" ] || fail "there is no config file $config; the ones that come with jaxcost are in configs/."
  train=(python scripts/train.py "$config" --workdir "$workdir" "${flags[@]}")
}

# from_bucket MOUNT: the folder gs://BUCKET/FOLDER is read through MOUNT, where every machine has the bucket as files.
# Its folders must be renamed as a whole, which checkpoints rely on: a bucket with a hierarchical namespace.
from_bucket() {
  [[ $workdir =~ ^gs://([^/]+)/(.+)$ ]] || fail "'$workdir' must be a folder of a bucket, gs://BUCKET/FOLDER, which all machines can read."
  bucket=${BASH_REMATCH[1]} workdir=$1/${BASH_REMATCH[2]}
  train=(python scripts/train.py "$config" --workdir "$workdir" "${flags[@]}")
}

# run COMMAND...: runs it, or prints it as it could be typed.
run() {
  if [ -n "$dry_run" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# Shows what the training costs on these chips, by their own compiler, and goes on only if that is agreed to.
agree_to_cost() {
  run python scripts/plan.py "$config" --topology "$topology" "${flags[@]}"
  [ -z "$dry_run$agreed" ] || return 0
  local answer=''
  read -r -p "Start it for this money? [y/N] " answer || true
  [[ $answer == [yY]* ]] || fail "not started; --yes agrees without being asked."
}
