#!/bin/sh
# From a fresh machine to a table and a picture, on generated data; under ten minutes on two CPU cores after the install.
#
#   sh scripts/demo.sh        # distillation: abdominal CT, teacher, student alone, distilled student
#   sh scripts/demo.sh crkd   # few labels: cardiac MRI, one labelled patient, the labels alone and CRKD
#
# A second call reuses what exists; remove runs/demo_btcv or runs/demo_acdc to train again.
set -e
. "$(dirname "$0")/setup.sh"
case ${1:-kd} in
    kd)
        echo "generating the phantom data set data/btcv_phantom (BTCV layout, 13 organs)"
        $python tools/make_demo_data.py --dataset btcv --out data/btcv_phantom --cases 16 --seed 0
        sh scripts/train.sh configs/demo_btcv.yaml
        ;;
    crkd)
        echo "generating the phantom data set data/acdc_phantom (ACDC layout, 20 patients)"
        $python tools/make_demo_data.py --dataset acdc --out data/acdc_phantom --cases 20 --seed 0
        sh scripts/train.sh configs/demo_acdc.yaml
        ;;
    *)
        echo "error: unknown demonstration $1; there are kd and crkd" >&2
        exit 2
        ;;
esac
