from reid_train.cli import main
from reid_train.ray_utils import keep_ray_home

keep_ray_home()
raise SystemExit(main())
