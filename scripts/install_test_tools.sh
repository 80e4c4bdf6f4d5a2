#!/usr/bin/env bash
# Installs what tests/browser, tests/multinode and tests/slurm need, where this machine lets us: as
# root, from Debian's packages. Without them those tests are skipped and say why; this never fails.
set -u
wanted=()
command -v chromium >/dev/null || wanted+=(chromium)
command -v ip >/dev/null || wanted+=(iproute2)
command -v slurmctld >/dev/null || wanted+=(slurm-wlm)
command -v munged >/dev/null || wanted+=(munge)
if [ "${#wanted[@]}" -eq 0 ]; then
  echo "test tools: all there"
elif [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
  echo "test tools: ${wanted[*]} missing, and only root can install them with apt-get: their tests are skipped"
elif export DEBIAN_FRONTEND=noninteractive
  timeout 60 apt-get update -qq >/dev/null 2>&1 &&
    timeout 300 apt-get install -y -qq --no-install-recommends "${wanted[@]}" >/dev/null 2>&1; then
  echo "test tools: installed ${wanted[*]}"
else
  echo "test tools: ${wanted[*]} cannot be installed here: their tests are skipped"
fi
exit 0
