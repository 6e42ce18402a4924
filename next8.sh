exec bash /work/tmp/signals/spare.sh
