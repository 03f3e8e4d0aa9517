#!/usr/bin/env bash
# Run the tests in two parallel processes: tests that never start a Ray, whose report is printed last, and tests that
# may. Options go to both. "No tests collected" (status 5) counts only if both report it.
set -u
case " $* " in *" tests"*) exec $PYTEST "$@" ;; esac # named tests run in one process
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
