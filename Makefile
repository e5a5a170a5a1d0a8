# make        set up, walk the chain from a text to an agent, print the report card
# make all    the same, and what lies beside it: a search over steps, guessing ahead, fewer bits, experts
# make moe    the mixture of experts alone
# make test   set up, pass the tests
# make clean  delete everything that was made, but not the environment

PYTHON = .venv/bin/python
RESUME = $(if $(wildcard out/$(1).resume.pt),--resume)

chain: out/dpo.pt
	$(PYTHON) sample.py --checkpoint out/base.pt
	$(PYTHON) sample.py --temperature 0 --prompt "Rocky Fair lies on the river Salt. The mayor of Rocky Fair is \
	Olive Smart. Who is the mayor of Rocky Fair?"
	$(PYTHON) rag.py
	$(PYTHON) agent.py
	$(PYTHON) injection.py
	$(PYTHON) chain.py

all: chain out/draft.pt moe
	$(PYTHON) tree.py
	$(PYTHON) speculative.py
	$(PYTHON) quantize.py
	$(PYTHON) chain.py

moe: out/moe.pt

# Two processes of one thread each: together they take about as long, so one core is never idle.
test: .venv/done
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j2 test_most test_rest

test_most:
	$(PYTHON) -m pytest -q tests --ignore-glob='tests/test_s[fp]*' --ignore-glob='tests/test_t[ar]*'

test_rest:
	$(PYTHON) -m pytest -q tests/test_s[fp]*.py tests/test_t[ar]*.py

# A checkpoint that is there is not made again; a run that was stopped goes on.
out/base.pt: | .venv/done
	$(PYTHON) train.py $(call RESUME,base)

out/sft.pt: out/base.pt
	$(PYTHON) sft.py $(call RESUME,sft)

out/dpo.pt: out/sft.pt
	$(PYTHON) dpo.py

out/draft.pt: out/base.pt
	$(PYTHON) train.py --name draft --depth 1 --width 128 --tokens_per_parameter 16 \
	--learning_rate 9e-3 $(call RESUME,draft)

out/moe.pt: | .venv/done
	$(PYTHON) moe.py $(call RESUME,moe)

.venv/done: requirements.txt
	python3 -m venv .venv
	$(PYTHON) -m pip install -q -r requirements.txt
	touch $@

clean:
	rm -rf out

.PHONY: chain all moe test test_most test_rest clean
