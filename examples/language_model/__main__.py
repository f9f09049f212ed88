"""The command line: python -m examples.language_model --help."""

from examples.language_model.commands import main

if __name__ == "__main__":
    main()
