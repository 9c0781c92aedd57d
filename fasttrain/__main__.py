"""`python -m fasttrain`"""

from fasttrain.cli.app import main

if __name__ == "__main__":
    main()
