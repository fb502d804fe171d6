#!/usr/bin/env bash
# Makes the Fashion-MNIST model that comes with fastdiff, from nothing: trains the diffusion model, then the classifier
# that judges its samples, then checks the samples. Installs nothing.
#
#   recipes/fashion_mnist.sh [data folder] [folder for the run]
#
# The data are Fashion-MNIST's four IDX files (Debian: apt install dataset-fashion-mnist). On two CPU cores the
# diffusion model takes hours, the classifier and the check minutes.
set -euo pipefail
data=${1:-/usr/share/datasets/fashion-mnist}
run=${2:-runs/fashion-mnist}
recipes=$(dirname "$0")

fastdiff train "$data/train-images-idx3-ubyte.gz" --labels "$data/train-labels-idx1-ubyte.gz" --size 32 --fit pad \
    --class-names "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot" --out "$run" \
    --channels 32,64,128 --layers 1 --attention 8 --groups 8 --scale-shift --class-image concat \
    --prediction v_prediction --schedule cosine \
    --lr 1e-3 --lr-warmup 200 --ema-decay 0.9995 --label-dropout 0.1 \
    --precision bf16 --compile --batch-size 128 --steps 6000 --seed 0

python "$recipes/train_classifier.py" --data "$data" --out "$run/classifier.safetensors"
python "$recipes/check_fashion_mnist.py" --data "$data" --model "$run/model" --classifier "$run" --out "$run/check"
