#!/usr/bin/env bash
# The tests in two processes side by side: those that never start a Ray, whose report comes at the end, and
# those that may. Other arguments than files go to both; an end without any test counts only if neither has one.
set -u
case " $* " in *" tests"*) exec $PYTEST "$@" ;; esac # what is named is run in one
report=$(mktemp)
trap 'rm -f "$report"' EXIT
$PYTEST tests/jobs tests/skipvision "$@" >"$report" 2>&1 &
without=$!
$PYTEST --ignore=tests/jobs --ignore=tests/skipvision "$@"
rest=$?
wait "$without"
code=$?
cat "$report"
[ "$rest" = 5 ] && [ "$code" = 5 ] && exit 5
[ "$rest" = 5 ] && rest=0
[ "$code" = 5 ] && code=0
exit $((rest > code ? rest : code))
