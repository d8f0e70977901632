# shellcheck shell=bash
# Functions of the launch scripts, which source this file. Needs bash 4.4.

MOUNT=${MOUNT:-/mnt/bucket} # part of a run's config.json: must not change between restarts
dry_run=0
arguments=() # of the program
program=()   # the complete command, for scripts that run it

fail() {
  echo "error: $*" >&2
  exit 2
}

parse_arguments() { # every option except --dry-run is the program's
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

require() { # checks variables; one message names all that are missing
  local variable missing=()
  for variable in "$@"; do
    [[ -n ${!variable:-} ]] || missing+=("$variable")
  done
  ((${#missing[@]} == 0)) || fail "set ${missing[*]}: see launch/README.md"
}

run() {
  if ((dry_run)); then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

program_arguments() { # $1: folder of data, runs and cache, the same for every process
  arguments=(
    "--config=$CONFIG" "--workdir=$1/runs/$NAME" "--config.data.path=$1/$DATA" "${arguments[@]}"
  )
}

program_command() { # $1 as above; the cache avoids compiling again after restarts
  program_arguments "$1"
  # shellcheck disable=SC2034 # used by the scripts that source this
  program=(
    env "JAX_COMPILATION_CACHE_DIR=$1/jax_cache" python -m xclip_jax.main "${arguments[@]}"
  )
}

yaml_list() { # the arguments, for ["..."] in a file whose quotes are already there
  local words=("$@") joined
  words=("${words[@]//\\/\\\\}")
  words=("${words[@]//\"/\\\"}")
  joined=$(printf '", "%s' "${words[@]}")
  printf '%s' "${joined:4}" # a, b -> a", "b, inside the quotes of "${ARGUMENTS}" in the file
}

fill() { # prints the file $1 with ${NAME} replaced by the value of each other argument NAME
  local content variable
  content=$(< "$1")
  for variable in "${@:2}"; do
    content=${content//"\${$variable}"/"${!variable:-}"}
  done
  printf '%s\n' "$content"
}

install_gcsfuse() {
  command -v gcsfuse > /dev/null && return
  local key=/usr/share/keyrings/cloud.google.asc packages=https://packages.cloud.google.com/apt
  curl -fsSL "$packages/doc/apt-key.gpg" | sudo tee "$key" > /dev/null
  echo "deb [signed-by=$key] $packages gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
  # A fresh worker may still be installing updates: wait for the lock.
  sudo apt-get -o DPkg::Lock::Timeout=600 update -qq
  sudo apt-get -o DPkg::Lock::Timeout=600 install -qqy gcsfuse
}

search_command() { # $1: index or serve; $2: the index; $3: a Python
  local words=("$3" -m xclip_jax.search "$1")
  if [[ $1 == index ]]; then
    words+=("$MOUNT/$VIDEOS" "--workers=ray")
  else
    words+=("--shards=$SHARDS")
  fi
  # shellcheck disable=SC2034 # used by the scripts that source this
  program=("${words[@]}" "--index=$2" "--model=$MOUNT/$MODEL" "${arguments[@]}")
}

tpu() { # a command of gcloud compute tpus in PROJECT and ZONE
  run gcloud compute tpus "$@" --zone="$ZONE" --project="$PROJECT"
}

on_workers() { # every word is quoted for the remote shell
  tpu tpu-vm ssh "$NAME" --worker=all --command="$(printf '%q ' "$@")"
}
