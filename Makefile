# Everything lives in .venv and is made when it is first needed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test extras clean

# what training, evaluation and prediction need
.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

# what the page, the reports, the tests and the benchmarks need besides
.venv/extras: .venv/ready requirements-extras.txt
	$(BIN)/python -m pip install --quiet --requirement requirements-extras.txt
	touch $@

extras: .venv/extras

# a real CT slice by texts alone, with the weights that are here; then trains on drawn slices, evaluates without a prompt,
# explains one slice; leaves out/demo/ct, table.json, plots, predict
SLICE = import pydicom.data as d; print(d.get_testdata_file("explicit_VR-UN.dcm", download=False))
ORGANS = liver spleen right_kidney left_kidney stomach aorta pancreas
demo: .venv/ready
	$(BIN)/python predict.py "$$($(BIN)/python -c '$(SLICE)')" --checkpoint weights/abdomen-ct.safetensors \
		$(foreach organ,$(ORGANS),--target "$(subst _, ,$(organ))") \
		--explain --out out/demo/ct
	$(BIN)/python train.py --dataset demo --light --image-size 128 --feature-grid 16 --batch-size 8 --max-steps 160 \
		--warmup 20 --out out/demo
	$(BIN)/python eval.py --checkpoint out/demo/last.safetensors --json out/demo/table.json --plots out/demo/plots
	$(BIN)/python -m readers.demo out/demo/slice.png
	$(BIN)/python predict.py out/demo/slice.png --checkpoint out/demo/last.safetensors --target liver --target spleen \
		--explain --out out/demo/predict

# two processes with a thread each, the longest file in one of them (tests/conftest.py)
test: .venv/extras
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests

clean:
	rm -rf .venv out cache
