.PHONY: quality style test

quality:  ## what continuous integration checks
	ruff check .
	ruff format --check .

style:  ## repair what can be repaired
	ruff check --fix .
	ruff format .

test:
	python -m pytest -n 2 -q
