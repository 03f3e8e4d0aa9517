#!/usr/bin/env bash
# The tests in two processes side by side: the library's, whose report comes at the end, and those that may
# start a Ray. Other arguments than files go to both; an end without any test counts only if neither has one.
set -u
case " $* " in *" tests"*) exec $PYTEST "$@" ;; esac # what is named is run in one
report=$(mktemp)
trap 'rm -f "$report"' EXIT
$PYTEST tests/skipvision "$@" >"$report" 2>&1 &
library=$!
$PYTEST --ignore=tests/skipvision "$@"
rest=$?
wait "$library"
code=$?
cat "$report"
[ "$rest" = 5 ] && [ "$code" = 5 ] && exit 5
[ "$rest" = 5 ] && rest=0
[ "$code" = 5 ] && code=0
exit $((rest > code ? rest : code))
