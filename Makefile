# make        set up, walk the whole chain, print the report card
# make test   set up, pass the tests
# make clean  delete everything that was made, but not the environment

PYTHON = .venv/bin/python

chain: out/base.pt
	$(PYTHON) sample.py
	$(PYTHON) chain.py

test: .venv/done
	$(PYTHON) -m pytest -q

# A checkpoint that is there is not made again; a run that was stopped goes on.
out/base.pt: | .venv/done
	$(PYTHON) train.py $(if $(wildcard out/base.resume.pt),--resume)

.venv/done: requirements.txt
	python3 -m venv .venv
	$(PYTHON) -m pip install -q -r requirements.txt
	touch $@

clean:
	rm -rf out

.PHONY: chain test clean
