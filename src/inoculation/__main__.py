from inoculation.cli import main

main()
