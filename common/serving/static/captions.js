// The words of the mini world's captions: one wording of each, as data/miniworld/captions.py writes them. A model of
// the mini world knows these words and few others; any other model reads the sentence as it reads any text.

export const BIOMES = {
  desert: "a wide sandy desert with red mesas",
  grass: "green grassland with round hills",
  snow: "a white snow field with dark firs",
  city: "a night city of lit towers",
  forest: "an autumn forest clearing with orange trees",
  coast: "a wide coast beside a blue sea",
};

export const WEATHERS = {
  clear: "under a clear sky",
  clouds: "under grey clouds",
  rain: "in steady rain",
  fog: "in thick fog",
  sunset: "at sunset",
};

export const COLORS = ["red", "blue", "yellow", "white", "green", "orange", "purple", "black"];

const VIEW = "The camera follows closely behind and above the car.";

// "A orange car" is no slip: the captions that the model learnt from say it so.
export function composeCaption(biome, weather, color) {
  return `A ${color} car drives through ${BIOMES[biome]} ${WEATHERS[weather]}. ${VIEW}`;
}

// What a caption of any wording speaks of: {biome, weather, color}, undefined where it does not say.
export function readCaption(text) {
  const caption = text.toLowerCase();
  return {
    biome: Object.keys(BIOMES).find((word) => new RegExp(`\\b${word}`).test(caption)), // also "grassland"
    weather: Object.keys(WEATHERS).find((word) => new RegExp(`\\b${word}\\b`).test(caption)), // but no forest "clearing"
    color: COLORS.find((word) => caption.includes(`${word} car`)),
  };
}
