# Sourced by the scripts of tables.

quoted() {  # quoted <words>: on one line, as a shell reads them back
    line=
    for word in "$@"; do
        case $word in
            '' | *[!A-Za-z0-9_./:=@%+,-]*)
                # $( ) would take away line ends, but not before a dot
                word=$(printf '%s.' "$word" | sed "s/'/'\\\\''/g")
                word="'${word%.}'"
                ;;
        esac
        line="$line${line:+ }$word"
    done
    printf '%s\n' "$line"
}
