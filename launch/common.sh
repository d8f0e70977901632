# shellcheck shell=bash
# What the launch scripts share: sourced by them, never run. Needs bash 4.4.

MOUNT=${MOUNT:-/mnt/bucket} # one path everywhere: a run's config.json holds it and must not change
dry_run=0
arguments=() # for the program
program=()   # the whole command, for the scripts that run it

fail() {
  echo "error: $*" >&2
  exit 2
}

parse_arguments() { # --dry-run is ours, every other option is the program's
  local argument
  for argument in "$@"; do
    case $argument in
      --dry-run) dry_run=1 ;;
      --*) arguments+=("$argument") ;;
      *) fail "$argument: every option starts with --" ;;
    esac
  done
}

refuse_arguments() { # for scripts that do not start the program
  ((${#arguments[@]} == 0)) || fail "${arguments[*]}: the only option is --dry-run"
}

require() { # variables by name; all that are missing in one message
  local variable missing=()
  for variable in "$@"; do
    [[ -n ${!variable:-} ]] || missing+=("$variable")
  done
  ((${#missing[@]} == 0)) || fail "set ${missing[*]}: launch/README.md says to what"
}

run() {
  if ((dry_run)); then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

program_arguments() { # $1: the folder with data, runs and the cache, the same on every process
  arguments=(
    "--config=$CONFIG" "--workdir=$1/runs/$NAME" "--config.data.path=$1/$DATA" "${arguments[@]}"
  )
}

program_command() { # $1 as above; the cache saves recompiling after every restart
  program_arguments "$1"
  # shellcheck disable=SC2034 # used where this is sourced
  program=(
    env "JAX_COMPILATION_CACHE_DIR=$1/jax_cache" python -m xclip_jax.main "${arguments[@]}"
  )
}

tpu() { # a command of gcloud compute tpus in our project and zone
  run gcloud compute tpus "$@" --zone="$ZONE" --project="$PROJECT"
}

on_workers() { # every word quoted for the shell at the other end
  tpu tpu-vm ssh "$NAME" --worker=all --command="$(printf '%q ' "$@")"
}
