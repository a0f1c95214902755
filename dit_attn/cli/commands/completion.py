"""``dit-attn completion SHELL``: a script that completes commands, flags and names with the Tab key."""

from __future__ import annotations

import argparse
import sys

from dit_attn.cli import options as flags
from dit_attn.cli import parser as parsers
from dit_attn.cli.completion import complete

# Every script hands the words of the line, one a line, to `dit-attn completion words`, which prints what may follow.
_BASH = r"""_dit_attn() {
    local line="${COMP_LINE:0:COMP_POINT}" current head breaks
    local -a words
    read -ra words <<< "$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    current="${words[${#words[@]}-1]}"
    local IFS=$'\n'
    COMPREPLY=($(printf '%s\n' "${words[@]:1}" | dit-attn completion words 2>/dev/null))
    breaks="${COMP_WORDBREAKS//[^:=]/}"  # bash replaces only what stands behind the last of these
    if [[ -n $breaks && $current == *[$breaks]* ]]; then
        head="${current%"${current##*[$breaks]}"}"
        COMPREPLY=("${COMPREPLY[@]#"$head"}")
    fi
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2>/dev/null
    return 0
}
complete -o default -F _dit_attn dit-attn
"""
_ZSH = r"""#compdef dit-attn
_dit_attn() {
    local -a found
    found=("${(@f)$(printf '%s\n' "${(@)words[2,CURRENT]}" | dit-attn completion words 2>/dev/null)}")
    found=(${found:#})
    if (( ${#found} )); then
        compadd -S '' -- ${(M)found:#*=}
        compadd -- ${found:#*=}
    else
        _files
    fi
}
compdef _dit_attn dit-attn
"""
_FISH = r"""function __dit_attn_words
    set -l words (commandline -opc)[2..-1]
    set -l current (commandline -ct)
    set -l found (printf '%s\n' $words "$current" | dit-attn completion words 2>/dev/null)
    if set -q found[1]
        printf '%s\n' $found
    else
        __fish_complete_path "$current"
    end
end
complete -c dit-attn -f -a '(__dit_attn_words)'
"""
SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
_WORDS = "words"
GROUPS = {
    "shell": (
        flags.Flag("shell", "shell that the script is for", default="required", choices=(*SCRIPTS, _WORDS),
                   metavar="bash|zsh|fish", positional=True),
    ),
}  # fmt: skip
_EXAMPLES = """examples:
  eval "$(dit-attn completion bash)"            # in ~/.bashrc
  eval "$(dit-attn completion zsh)"             # in ~/.zshrc, after compinit
  dit-attn completion fish > ~/.config/fish/completions/dit-attn.fish
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``completion``."""
    parsers.describe(
        parser,
        "completion SHELL",
        "Print a script that lets a shell complete commands, flags, models, methods and their settings.",
        _EXAMPLES,
    )
    parsers.add_groups(parser, GROUPS)


def run(args: argparse.Namespace) -> int:
    """Print the script, or with ``words`` what may follow the words on standard input. Returns 0."""
    from dit_attn.cli import COMMANDS, groups_of

    shell = flags.merge(args, GROUPS)["shell"]
    if shell != _WORDS:
        print(SCRIPTS[shell], end="")
        return 0
    words = sys.stdin.read().split("\n")[:-1]
    for word in complete(words, {name: lambda name=name: groups_of(name) for name in COMMANDS}):
        print(word)
    return 0
