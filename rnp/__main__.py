from rnp.cli.main import main

main()
