_base_ = "sample.py"

prompt_path = None
prompt = [
    "Drone view of waves crashing against the rugged cliffs along Big Sur's garay point beach. "
    '{"reference_path": "assets/images/condition/cliff.png", "mask_strategy": "0"}',
    'A breathtaking sunrise scene.{"reference_path": "assets/images/condition/sunset1.png","mask_strategy": "0"}',
    'A car driving on the ocean.{"reference_path": "assets/videos/condition/drive.mp4","mask_strategy": "0,0,-8,0,8"}',
    'A snowy forest.{"reference_path": "assets/videos/condition/forest.mp4","mask_strategy": "0,0,0,0,15,0.8"}',
    "A breathtaking sunrise scene."
    '{"reference_path": "assets/images/condition/sunset1.png;assets/images/condition/sunset2.png",'
    '"mask_strategy": "0;0,1,0,-1,1"}',
    "|0|a white jeep equipped with a roof rack driving on a dirt road in a coniferous forest."
    "|2|a white jeep equipped with a roof rack driving on a dirt road in the desert."
    "|4|a white jeep equipped with a roof rack driving on a dirt road in a mountain."
    "|6|A white jeep equipped with a roof rack driving on a dirt road in a city."
    "|8|a white jeep equipped with a roof rack driving on a dirt road on the surface of a river."
    "|10|a white jeep equipped with a roof rack driving on a dirt road under the lake."
    "|12|a white jeep equipped with a roof rack flying into the sky."
    "|14|a white jeep equipped with a roof rack driving in the universe. Earth is the background."
    '{"reference_path": "assets/videos/condition/drive.mp4", "mask_strategy": "0,0,0,0,15"}',
]
loop = 2
condition_frame_length = 4
