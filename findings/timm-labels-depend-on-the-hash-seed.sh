#!/usr/bin/env bash
# timm: the labels of an image folder depend on PYTHONHASHSEED if two class names sort alike.
#
# timm sorts class names, which it keeps in a set, by a key that ignores case and leading zeros. Names
# such as 1 and 01, or Cat and cat, have one key, so they keep the order of the set, which Python's
# hash seed decides. Training, evaluation, a resumed run and each process of a distributed run may
# give one folder different labels.
#
# Expected: the same folder gives the same labels in each process.
# Seen:     {'01': 0, '1': 1} with some hash seeds, {'1': 0, '01': 1} with others.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 timm==1.0.31
cat > "$folder/case.py" <<'PY'
import sys
from importlib.metadata import version

from timm.data import create_dataset

print("timm", version("timm"), create_dataset("", root=sys.argv[1]).reader.class_to_idx)
PY
for name in 1 01; do
    mkdir -p "$folder/images/$name"
    touch "$folder/images/$name/0.png"
done
for seed in 0 1 2 3 4 5 6 7; do
    PYTHONHASHSEED=$seed "$folder/venv/bin/python" "$folder/case.py" "$folder/images"
done | tee "$folder/seen"
test "$(sort -u "$folder/seen" | wc -l)" -eq 2
