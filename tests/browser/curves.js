// Every curve: its colour, its length in the plot's percent, and the share of 41 places on it where
// a curve or a dot is what the screen shows (dashes have gaps, and marks lie over them).
[...document.querySelectorAll('.line')].map(line => {
  line.scrollIntoView({block: 'center', behavior: 'instant'});
  const length = line.getTotalLength(), matrix = line.getScreenCTM();
  const places = [...Array(41).keys()].map(i => line.getPointAtLength(length * i / 40));
  const hits = places.map(place => place.matrixTransform(matrix))
    .map(place => document.elementFromPoint(place.x, place.y))
    .filter(found => found && found.matches('.line, .dot') && found.closest('svg') === line.closest('svg'));
  return {length, seen: hits.length / places.length, colour: getComputedStyle(line).stroke};
})
