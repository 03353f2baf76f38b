/*
 * Import what `medsd heatmap` left into every image of the open QuPath project, in one go.
 *
 * For each image the folder `<maps>/<name of the slide file without its ending>/` is looked for; from it
 *   regions.geojson  become annotations: regions of the target above the validated threshold;
 *   tiles.geojson    become detections: a grid with the maps' values as measurements (Measure > Show measurement maps);
 *                    it is there after `medsd heatmap --tiles-geojson`.
 *
 * How: open the project, Automate > Script editor, open this file, choose Run > Run (once, NOT "Run for project"),
 * and name the folder that was given to `medsd heatmap --out`. Objects that were drawn by hand stay. The same maps
 * imported again are not doubled, for their objects keep their ids; those of other maps of the slide stay beside them,
 * so delete these first (Objects > Delete, or by their class). Save the image that is open in the viewer
 * first, and open it again afterwards: it is read from the project, not from the viewer.
 *
 * Both files count pixels as QuPath does, from the corner of the scanned area. Research use only.
 *
 * Written after the API of QuPath 0.5 and 0.6; not run in QuPath by its authors.
 */

import qupath.fx.dialogs.FileChoosers
import qupath.lib.io.PathIO

def project = getProject()
if (project == null) {
    println 'Open a project first: Project > Open project.'
    return
}

def maps = FileChoosers.promptForDirectory('Folder of medsd heatmap', null)
if (maps == null)
    return

int imported = 0
int missing = 0
for (entry in project.getImageList()) {
    // The name of the file, and not the one that the image was given in the project; images of one file with several
    // pictures in it share it, so that only its first, the slide, may be taken.
    def uris = entry.getURIs()
    def fileName = uris.isEmpty() ? entry.getImageName() : new File(uris.iterator().next().getPath()).getName()
    int dot = fileName.lastIndexOf('.')
    def stem = dot > 0 ? fileName.substring(0, dot) : fileName
    def folder = new File(maps, stem)
    def files = ['regions.geojson', 'tiles.geojson'].collect { new File(folder, it) }.findAll { it.isFile() }
    if (files.isEmpty()) {
        println "${entry.getImageName()}: no regions.geojson or tiles.geojson in ${folder}"
        missing++
        continue
    }

    def imageData = entry.readImageData()
    def hierarchy = imageData.getHierarchy()
    int count = 0
    for (file in files) {
        def objects = PathIO.readObjects(file)
        // The same objects of an earlier import have the same ids.
        def ids = objects.collect { it.getID() } as Set
        def before = hierarchy.getFlattenedObjectList(null).findAll { it.getID() in ids }
        hierarchy.removeObjects(before, true)
        hierarchy.addObjects(objects)
        count += objects.size()
    }
    entry.saveImageData(imageData)
    println "${entry.getImageName()}: ${count} objects of ${files.collect { it.getName() }.join(' and ')}"
    imported++
}
project.syncChanges()
println "${imported} image(s) imported, ${missing} without maps in ${maps}. Open an image to see them."
