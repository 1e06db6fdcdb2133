from reid_train.cli import main

raise SystemExit(main())
