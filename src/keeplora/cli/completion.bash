_keeplora() {
  local words
  case "$COMP_CWORD-${COMP_WORDS[1]}" in
    1-*) words="COMMANDS" ;;
CASES
  esac
  [[ "$COMP_CWORD" = 1 || "$2" = -* ]] && COMPREPLY=($(compgen -W "$words" -- "$2"))
}
complete -o default -F _keeplora keeplora
