from reid_train.ray_utils import keep_ray_home
from tune.cli import main

keep_ray_home()
raise SystemExit(main())
