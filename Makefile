# make        set up, walk the whole chain, print the report card
# make test   set up, pass the tests
# make clean  delete everything that was made, but not the environment

PYTHON = .venv/bin/python
RESUME = $(if $(wildcard out/$(1).resume.pt),--resume)

chain: out/dpo.pt out/draft.pt
	$(PYTHON) sample.py --checkpoint out/base.pt
	$(PYTHON) sample.py --temperature 0 --prompt "Rocky Fair lies on the river Salt. The mayor of Rocky Fair is \
	Olive Smart. Who is the mayor of Rocky Fair?"
	$(PYTHON) speculative.py
	$(PYTHON) quantize.py
	$(PYTHON) chain.py

test: .venv/done
	$(PYTHON) -m pytest -q

# A checkpoint that is there is not made again; a run that was stopped goes on.
out/base.pt: | .venv/done
	$(PYTHON) train.py $(call RESUME,base)

out/sft.pt: out/base.pt
	$(PYTHON) sft.py $(call RESUME,sft)

out/dpo.pt: out/sft.pt
	$(PYTHON) dpo.py

out/draft.pt: out/base.pt
	$(PYTHON) train.py --name draft --depth 1 --width 128 $(call RESUME,draft)

.venv/done: requirements.txt
	python3 -m venv .venv
	$(PYTHON) -m pip install -q -r requirements.txt
	touch $@

clean:
	rm -rf out

.PHONY: chain test clean
