#!/bin/sh
# From a fresh machine to a table and a picture, on generated data; under ten minutes on two CPU cores after the install.
#
#   sh scripts/demo.sh        # distillation: abdominal CT, teacher, student alone, distilled student
#   sh scripts/demo.sh crkd   # few labels: cardiac MRI, one labelled patient, the labels alone and CRKD
#
# A second call reuses what exists; remove runs/demo_btcv or runs/demo_acdc to train again.
set -e
case ${1:-kd} in
    kd)
        echo "the demonstration of distillation, in four steps: install what is missing, generate 16 CT phantoms, train a"
        echo "teacher, a student alone and a distilled student, test the three; six minutes on two idle CPU cores after the"
        echo "install; it ends with a table and a picture, and goes on where it was stopped"
        ;;
    crkd)
        echo "the demonstration of few labels, in four steps: install what is missing, generate 20 cardiac phantoms, train"
        echo "with one labelled patient alone and by CRKD, test both; ten minutes on two CPU cores after the install; it"
        echo "ends with a table and a picture, and goes on where it was stopped"
        ;;
    *)
        echo "error: unknown demonstration $1; there are kd and crkd" >&2
        exit 2
        ;;
esac
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
esac
