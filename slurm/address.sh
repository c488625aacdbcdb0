#!/usr/bin/env bash
# Prints the address of this node that the others of the job reach it by: of EUREKA_INTERFACE, else the one that belongs to its name.
set -euo pipefail
if [[ -n "${EUREKA_INTERFACE:-}" ]]; then
  ip -o -4 addr show "$EUREKA_INTERFACE" | awk '{sub("/.*", "", $4); print $4; exit}'
else
  getent ahostsv4 "$SLURMD_NODENAME" | awk '$1 !~ /^127[.]/ {print $1; exit}'
fi
