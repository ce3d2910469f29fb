# Own tokenizers, their agreement, and a Dutch model from text to a Hugging Face folder and back, on a CPU:
#     bash records/2026-11-21_dutch/go.sh DATA        from the root of the repository
# DATA has the Parquet folders dutch/, books/ and imdb/. It writes data/, out/dutch and hf/dutch.
set -e
export OMP_NUM_THREADS=1
here=records/2026-11-21_dutch lib=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
mkdir -p data hf

for name in dutch books; do
    for time in first second; do
        python tokenizer.py --dataset="$1/$name" --vocab_size=52000 --out=data/$name.$time.json
    done
done
sha256sum data/*.json
python $here/held_out.py data/dutch.first.json "$1/dutch/validation*.parquet" data/books.first.json "$1/books/validation*.parquet"
python $here/agree.py data/dutch.first.json,data/books.first.json "$1/dutch/*.parquet" "$lib/**/*.py" "$1/imdb/*.parquet" "$1/books/*.parquet"

python fineweb.py --dataset="$1/dutch" --val_split=validation --tokenizer=data/dutch.first.json --out_dir=data/dutch
python train_gpt2.py $here/config.py
python report.py out/dutch
python evaluate.py --model=out/dutch --data_dir=data/dutch
for start in "De bestanden" "U kunt" "Klik op"; do
    python sample.py --model=out/dutch --start="$start" --max_new_tokens=80
done

python huggingface.py --model=out/dutch --out_dir=hf/dutch
python $here/readback.py out/dutch hf/dutch "$1/dutch/validation*.parquet"
for start in "De bestanden" "U kunt" "Klik op"; do
    for model in out/dutch hf/dutch; do
        python sample.py --model=$model --start="$start" --max_new_tokens=80 --temperature=0 > $model.greedy.txt
    done
    cmp out/dutch.greedy.txt hf/dutch.greedy.txt && echo "greedy samples equal: $start"
done
