# The other launchers source this file. It finds a Python and makes an environment with lmjax in it.
#
#   LMJAX_PYTHON   the Python that makes the environment (default: the first one of 3.11 or newer)
#   LMJAX_VENV     where the environment is (default: .venv beside pyproject.toml)
#   LMJAX_EXTRAS   further extras to install, such as "tpu" or "test,oracle"

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

say() { printf 'lmjax: %s\n' "$*" >&2; }
die() { say "$@"; exit 2; }

# show_help ARGS: prints the comment at the head of the script for -h and --help, unless they come
# after --, where they belong to the command.
show_help() {
  local word
  for word; do
    case "$word" in
      --) return ;;
      -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit ;;
    esac
  done
}

# usable_python PYTHON: whether it runs here and is new enough.
usable_python() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  local candidate
  if [[ -n "${LMJAX_PYTHON:-}" ]]; then
    usable_python "$LMJAX_PYTHON" ||
      die "expected LMJAX_PYTHON to be a Python >= 3.11, got $LMJAX_PYTHON"
    printf '%s\n' "$LMJAX_PYTHON"
    return
  fi
  for candidate in python3 python3.12 python3.11 python3.13 python; do
    if usable_python "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  die "expected Python >= 3.11, got $(python3 --version 2>&1 || true);" \
    "install one, or name it: LMJAX_PYTHON=/path/to/python $0"
}

# constraints_for 3.11: prints the file of tested versions for that Python, if there is one.
constraints_for() {
  local file="$root/launch/constraints-py${1//./}.txt"
  if [[ -f "$file" ]]; then printf '%s\n' "$file"; fi
}

python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

# setup EXTRA,EXTRA: sets `python` to the Python of an environment that has lmjax and the extras.
# Installs only if pyproject.toml, the tested versions, the checkout's path or the extras differ
# from those in the environment's stamp.
setup() {
  local venv="${LMJAX_VENV:-$root/.venv}" extras="$1" base="" version constraints stamp state log
  python="$venv/bin/python"
  stamp="$venv/lmjax-installed"
  # venv installs pip last: an environment without pip is unfinished.
  if ! usable_python "$python" || [[ ! -e "$venv/bin/pip" ]]; then
    base="$(find_python)"
    say "making $venv with $("$base" --version)"
    "$base" -m venv "$venv" ||
      die "$base cannot make an environment; on Debian: apt install python3-venv"
  fi
  version="$(python_version "$python")"
  constraints="$(constraints_for "$version")"
  state="$root $(cat "$root/pyproject.toml" ${constraints:+"$constraints"} | cksum)"
  if [[ -f "$stamp" && "$(head -n 1 "$stamp")" == "$state" ]]; then
    # Extras add up, so that running `test` and `local` in turn installs only once.
    local have; have="$(tail -n 1 "$stamp")"
    if has_all "$have" "$extras"; then return; fi
    extras="$have,$extras"
  fi
  extras="$(tr ',' '\n' <<<"$extras" | sed '/^$/d' | sort -u | paste -sd, -)"
  say "installing into $venv${extras:+ with $extras} (about two minutes)"
  [[ -n "$constraints" ]] || say "no pinned versions for Python $version: taking the newest"
  rm -f "$stamp"
  log="$venv/install.log"
  # Compiling all modules would take a minute. Python compiles those that it imports.
  "$python" -m pip install --quiet --no-compile --disable-pip-version-check --no-input \
    ${constraints:+--constraint "$constraints"} \
    --editable "$root${extras:+[$extras]}" >"$log" 2>&1 ||
    { cat "$log" >&2; die "the installation failed; its output is above and in $log"; }
  printf '%s\n%s\n' "$state" "$extras" >"$stamp"
}

# has_all "a,b,c" "a,c": whether every word of the second list is in the first.
has_all() {
  local extra
  for extra in ${2//,/ }; do
    [[ ",$1," == *",$extra,"* ]] || return 1
  done
}
