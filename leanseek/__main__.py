from leanseek.cli import main

main()
